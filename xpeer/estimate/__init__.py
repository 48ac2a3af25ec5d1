"""What a run needs: memory, disk, bytes and time, before it starts."""
