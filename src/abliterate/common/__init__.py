"""What any program needs: errors, whole files, progress, watching."""
