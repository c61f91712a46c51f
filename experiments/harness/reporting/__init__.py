"""Reports as one HTML file, and tables of fitted laws."""
