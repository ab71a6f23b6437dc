"""The limits for what comes from outside, and the escaping of texts that go out to others."""
