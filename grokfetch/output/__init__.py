"""Output for people and programs: progress bars, JSON lines, the terminal, the report page."""
