"""What was found, to look at: one-file reports, a leaderboard, a local app."""
