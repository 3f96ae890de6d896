"""The commands, a module each group; importing one registers its commands."""
