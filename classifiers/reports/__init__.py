"""Reports: HTML pages, plots and tables, for a browser and for a terminal."""
