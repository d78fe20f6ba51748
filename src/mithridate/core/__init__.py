"""What every part shares: the nouns of the library, one a file; nothing here knows of any single component."""
