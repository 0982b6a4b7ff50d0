"""Encoded collections that are searched and labelled with any words.

rows        encodings of images as rows of tables, and back
masks       masks of proposals, in two bits a cell
contrast    the contrast words' part in each proposal's softmax, computed once
store       tables on disk, with versions
head        the file that says which versions of the tables are the index
writer      changes that appear at once or not at all
adding      images that are encoded into the index
scoring     the model's own rule over stored proposals
answers     images and regions that a search returns
page        an answer as a page of pictures
relabel     labels from what is stored
collection  the object that a user holds
"""
