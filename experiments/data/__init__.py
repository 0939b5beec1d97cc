"""Data sets: PASCAL VOC 2007, a generated demo in its layout, and the crops of their images."""
