"""Makes text from anywhere safe for a terminal or a page."""


def printable(value: object) -> str:
    """The value as one line in which nothing is hidden.

    A character that is not printable becomes U+FFFD: terminal escapes, marks that turn the order of text or take no
    room, halves of surrogate pairs. Line ends and other blanks become a space. Use it for all that a file says, as its
    writer may be a stranger.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
