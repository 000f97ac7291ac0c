"""placeholder by the lead: replace me"""
PINNED: dict[str, str] = {}
