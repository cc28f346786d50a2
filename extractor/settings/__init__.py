"""Every setting, declared once: for the command line, job files and Python alike."""
