"""Reading files by threads of C and of Python, beside nothing, beside busy Python, and beside compute."""
