"""What is shown of texts and activations, from plain values: HTML pages, the token view, tables and plots."""
