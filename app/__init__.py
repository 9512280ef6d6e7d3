"""The demo app: a picture, a question, which patches stay, and the answers with and without compression."""
