"""The tables of a report, for the page and as Markdown: one file a subject."""
