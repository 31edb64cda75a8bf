"""A card for each penalty, in Markdown: what ``orthokit list NAME`` shows."""
