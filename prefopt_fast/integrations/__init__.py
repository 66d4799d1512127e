"""Our operator and losses in other people's trainers; nothing is imported here, each module needs its own extra."""
