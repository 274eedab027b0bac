"""Models for other programs: each format is a module that writes it and lets its consumer read it back."""
