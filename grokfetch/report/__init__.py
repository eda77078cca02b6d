"""A folder as one page."""
