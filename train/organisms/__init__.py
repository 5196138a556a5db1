"""How the embedded organisms are made."""
