"""Trackers of this package, one short file each. A library is imported only by the tracker that was chosen."""
