"""slicemod within other programs: what `slicemod install` puts there, and what that then calls."""
