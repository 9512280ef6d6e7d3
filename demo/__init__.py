"""What `make demo` runs, and the script that draws the pictures of the documentation."""
