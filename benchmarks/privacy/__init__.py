"""What privacy costs, and what attackers get in spite of it."""
