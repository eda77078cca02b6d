"""A folder as one page for a browser: `page.render`."""
