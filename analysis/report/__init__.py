"""Write the report: one HTML page, the same in short in Markdown, figures and tables."""
