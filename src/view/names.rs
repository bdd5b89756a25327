//! What a tensor is, told by its name: embeddings, heads. The only place that knows such names.

/// Heads that models tie to their input embedding …
const HEADS: [&str; 4] =
    ["lm_head.weight", "embed_out.weight", "predictions.decoder.weight", "output_projection.weight"];
/// … which goes by one of these names.
const EMBEDDINGS: [&str; 6] = [
    "embed_tokens.weight",
    "wte.weight",
    "shared.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
];
/// Biases with one entry a token.
const HEAD_BIASES: [&str; 4] =
    ["lm_head.bias", "embed_out.bias", "predictions.decoder.bias", "predictions.bias"];

/// Endings of BERT's normalisations: what TensorFlow called them, as its checkpoints were published, and what they are saved
/// as today. `transformers` takes one for the other.
const TWINS: [[&str; 2]; 2] = [["LayerNorm.gamma", "LayerNorm.weight"], ["LayerNorm.beta", "LayerNorm.bias"]];

/// The other name that a tensor may have in a checkpoint of the same model.
pub fn twin(name: &str) -> Option<String> {
    let swap = |from: &str, to: &str| name.strip_suffix(from).map(|stem| format!("{stem}{to}"));
    TWINS.iter().find_map(|[old, new]| swap(old, new).or_else(|| swap(new, old)))
}

/// A head that models tie to their input embedding.
pub fn is_head(name: &str) -> bool {
    HEADS.iter().any(|head| name.ends_with(head))
}

/// An input embedding with one row a token.
pub fn is_token_embedding(name: &str) -> bool {
    EMBEDDINGS.iter().any(|embedding| name.ends_with(embedding))
}

/// A tensor whose first dimension counts tokens.
pub fn is_vocabulary(name: &str) -> bool {
    is_head(name) || is_token_embedding(name) || HEAD_BIASES.iter().any(|bias| name.ends_with(bias))
}

/// Lookup tables: rows are looked up, not multiplied, so a Gram over their columns means nothing.
pub fn is_embedding(name: &str) -> bool {
    name.split('.').any(|part| {
        let part = part.to_ascii_lowercase();
        part.contains("embed")
            || part.contains("position")
            || matches!(part.as_str(), "wte" | "wpe" | "shared" | "relative_attention_bias")
    })
}

/// Whether a tensor outside the layers belongs before them (embeddings and their norms) rather than after them.
pub fn stands_before_layers(name: &str) -> bool {
    is_embedding(name) && !is_head(name) && !name.contains("embed_out")
}
