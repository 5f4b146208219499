"""Emoji scenes: the data, captions and exact labels behind the bundled checkpoint `emoji-sd`.

`scenes` renders pictures from the Noto colour emoji font, `judge` measures how well a picture follows its caption.
Neither is imported here, so that importing this package stays light.
"""
