"""The daemon's half of exchanges: who meets whom and when, and what is remembered of partners."""
