"""Adapters on disk: minirank's own file, and PEFT's folders both ways.

adapter_file.py      save_adapter, load_adapter, read_adapter: one adapter in one file
other_tensors.py     what such a file holds beside the adapters
base_fingerprint.py  whether a model is the one that the adapter was trained beside
peft_export.py       export_peft: a folder that PEFT reads
peft_import.py       import_peft: a folder that PEFT wrote
peft_folder.py       what the two share
peft_experts.py      stacks of experts in PEFT's folder: target_parameters
saved_layer.py       a LoRA layer without its base, and the checks that all formats share
safetensors_file.py  the safetensors format, and files that are written whole or not at all

Every function here either succeeds or changes nothing. Saving puts a file into its place only when
it is complete on the disk. Loading checks everything before it touches the model.

**Our file** is one safetensors file.

- Tensors: `<module>.lora_A` (r, d_in), `<module>.lora_B` (d_out, r), and `<module>.gate` (r,) where
  the layer has gates. In a stack of experts A and B have one more axis in front. What trained
  beside the adapters is there under its own name. All are bit for bit what the model had, in its
  types.
- Metadata, under "minirank" (JSON): the format's number (2); for each layer its rank, shape, alpha,
  reference rank, scaling, start value of gates, dropout, and whether it is enabled; a fingerprint
  of each base module; which parameters beside the adapters require a gradient; the further names
  of tied tensors; and where the ranks came from. Under "checksum": the SHA-256 of all of it.
- Not in the file: the base weights, optimizers, L1RA's own state (its `state_dict`), and whether
  single adapters were frozen. After loading, all adapters train.
- Files of minirank 0.1 (format 1) are read. They do not say what trained, so every module
  in them is taken as trained.

A packed (quantised) base has a fingerprint of what its state_dict holds, such as packed data and
scales. The same model not quantised is another base: other_base=True accepts it.

Refused: files that are cut off, changed or foreign; other base weights, unless they are meant
(other_base=True), since an adapter computes nonsense beside them; layers that are merged, whose
base weights already hold the adapter; numbers that are not finite; tensors whose values are
elsewhere (meta device, DTensor).

**PEFT's folder** holds two files. export_peft writes them for PEFT 0.15 or newer.

- adapter_config.json: r, lora_alpha, target_modules, rank_pattern, alpha_pattern, and other options
  of LoraConfig.
- adapter_model.safetensors: `base_model.model.<module>.lora_A.weight` (r, d_in) and
  `….lora_B.weight` (d_out, r). They are the same for transformers' Conv1D, where PEFT transposes
  the product.

PEFT computes y = W x + b + alpha / r · B A x, and alpha / sqrt(r) with use_rslora. Its traps, and
what is done here about them:

- PEFT rescales a layer when its rank changes at one lora_alpha. Here the scaling is fixed, and
  written as alpha = scaling · r for every layer.
- A list in target_modules names suffixes: "fc" also means "enc.fc". export_peft writes one regular
  expression that matches the full names.
- The keys of rank_pattern and alpha_pattern are regular expressions. A key may match the whole name
  or its end after a dot, and the first key that matches wins. export_peft writes "^" and the
  escaped name of each layer. import_peft follows PEFT's rule. PEFT sorts the keys when it saves: if
  two of them match one name, what PEFT loads is not always what it trained.
- Some loaders (vLLM, diffusers) ignore alpha_pattern, and scale wrongly. For these,
  export_peft(…, portable=True) multiplies the scaling into B and sets every alpha to the rank.
- Stacks of experts are PEFT's target_parameters, written for PEFT 0.21 or newer (peft_experts.py).
  import_peft does not read them.
- PEFT turns the expression in target_modules of some models with stacks (Mixtral, Qwen3-MoE) into
  suffixes, and adapts all modules that end so. The others get a B of zeros, which changes nothing,
  and PEFT warns that their keys are missing.
- PEFT has no gates: they are multiplied into B. It has one dropout for all layers: the largest of
  them is written. It has no rank 0: such layers are left out.
- PEFT adapts nn.Linear and transformers' Conv1D, not other modules that compute the same.
- The fast path of nn.TransformerEncoderLayer reads weights without calling modules, and so leaves
  PEFT's adapters out. export_peft warns.
- PEFT's task types TOKEN_CLS and SEQ_CLS put the head into modules_to_save, which is refused here.
  Export the encoder without its head (export_peft(model.bert, …)), and save the head apart.

Refused by name, since PEFT would compute another function, or the folder is not plain LoRA of
linear layers: a module in several places (PEFT adapts one of them); nn.MultiheadAttention's
out_proj (PEFT's adapter has no effect there); disabled layers; and on import DoRA, AdaLoRA and
other methods, adapters of embeddings and convolutions, trained biases, modules_to_save, starts that
change the base weights (PiSSA, OLoRA, …, unless PEFT converted them), and every option that this
version does not know.
"""
