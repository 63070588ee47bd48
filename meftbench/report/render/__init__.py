"""Results and tables as the terminal, pages, files and other programs take them."""
