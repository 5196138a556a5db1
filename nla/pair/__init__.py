"""A trained pair: encoder, decoder, their roles, its folder, scores and trust."""
