"""Who is alive: members' cards, and how they spread among members and lie in the DHT."""
