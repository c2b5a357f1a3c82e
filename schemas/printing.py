"""Text from anywhere as it may reach a terminal or a page."""


def printable(value: object) -> str:
    """One line in which nothing is hidden: what is no printable character (terminal escapes, marks that turn the order
    of text or take no room, halves of surrogate pairs) becomes U+FFFD, line ends and other blanks become a space.

    For all that a file says: its writer may be a stranger.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
