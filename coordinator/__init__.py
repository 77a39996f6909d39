"""The brain and the front door: decides where calls run and speaks OpenAI's API."""
