"""GGUF files as a source: read (:mod:`.header`), understood (:mod:`.config`, :mod:`.tokens`,
:mod:`.names`), and written as an ordinary folder (:mod:`.folder`), once for a file that is given
where a folder is taken (:mod:`.cached`).

What llama.cpp's converter did to a checkpoint is undone with transformers' own tables, so that the
folder means what ``from_pretrained(..., gguf_file=...)`` means. Where transformers would leave
something out in silence (a tensor without a place, rotary scaling, biases), it is carried over here
or refused.
"""
