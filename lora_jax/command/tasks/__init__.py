"""What the command can train."""
