"""What people and machines see: progress bars, JSON lines, the terminal, the report page."""
