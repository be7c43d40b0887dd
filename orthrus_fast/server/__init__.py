"""The server: OpenAI's interface over one decoder, and a page to chat on."""
