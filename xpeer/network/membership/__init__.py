"""Who belongs to the swarm: certificates, invitations, and the key that members share."""
