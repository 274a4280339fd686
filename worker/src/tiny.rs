//! A tiny Llama model with random weights, written as a GGUF file.
//!
//! Tests, here and in other crates, need a model that computes the same way as a
//! real one but costs nothing. Its tokenizer knows every byte, a few merges, and
//! the two markers of its chat template; its answers mean nothing.

use std::fs;
use std::io;
use std::path::Path;

use half::f16;

/// Sizes of a tiny model.
#[derive(Clone, Copy, Debug)]
pub struct TinyModel {
    /// Start of the random weights.
    pub seed: u64,
    /// Layers.
    pub layers: u32,
    /// Query heads of 16 values each.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Positions.
    pub context: u32,
}

/// Values per head of every tiny model.
const HEAD_DIM: u32 = 16;
const FEED_FORWARD: u32 = 96;
const MERGES: [(&str, &str); 4] = [("t", "h"), ("th", "e"), ("\u{120}", "the"), ("a", "n")];
const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl Default for TinyModel {
    fn default() -> Self {
        Self { seed: 1, layers: 3, heads: 6, kv_heads: 2, context: 512 }
    }
}

impl TinyModel {
    /// Writes the file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, self.to_bytes())
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Writer::default();
        let tokens = tokens();
        let hidden = self.heads * HEAD_DIM;
        file.text("general.architecture", "llama");
        file.text("general.name", "tiny");
        for (key, value) in [
            ("llama.block_count", self.layers),
            ("llama.context_length", self.context),
            ("llama.embedding_length", hidden),
            ("llama.feed_forward_length", FEED_FORWARD),
            ("llama.attention.head_count", self.heads),
            ("llama.attention.head_count_kv", self.kv_heads),
            ("llama.rope.dimension_count", HEAD_DIM),
            ("tokenizer.ggml.bos_token_id", 257),
            ("tokenizer.ggml.eos_token_id", 258),
        ] {
            file.number(key, value);
        }
        file.float("llama.attention.layer_norm_rms_epsilon", 1e-5);
        file.float("llama.rope.freq_base", 10_000.0);
        file.text("tokenizer.ggml.model", "gpt2");
        file.text("tokenizer.ggml.pre", "smollm");
        file.texts("tokenizer.ggml.tokens", &tokens);
        file.texts("tokenizer.ggml.merges", &MERGES.map(|(left, right)| format!("{left} {right}")));
        let is_special = |token: &String| SPECIALS.contains(&token.as_str());
        let kinds: Vec<i32> = tokens.iter().map(|token| if is_special(token) { 3 } else { 1 }).collect();
        file.integers("tokenizer.ggml.token_type", &kinds);
        file.text("tokenizer.chat_template", TEMPLATE);
        self.tensors(&mut file, tokens.len(), hidden);
        file.finish()
    }

    fn tensors(&self, file: &mut Writer, vocabulary: usize, hidden: u32) {
        let mut random = Random(self.seed);
        let vocabulary = u32::try_from(vocabulary).expect("a few hundred tokens");
        let kv = self.kv_heads * HEAD_DIM;
        file.half_matrix("token_embd.weight", vocabulary, hidden, 1.0, &mut random);
        file.vector("output_norm.weight", hidden, &mut random);
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            file.vector(&name("attn_norm"), hidden, &mut random);
            file.vector(&name("ffn_norm"), hidden, &mut random);
            for (part, rows, columns) in [
                ("attn_q", hidden, hidden),
                ("attn_k", kv, hidden),
                ("attn_v", kv, hidden),
                ("attn_output", hidden, hidden),
                ("ffn_gate", FEED_FORWARD, hidden),
                ("ffn_up", FEED_FORWARD, hidden),
                ("ffn_down", hidden, FEED_FORWARD),
            ] {
                file.half_matrix(&name(part), rows, columns, 0.2, &mut random);
            }
        }
    }
}

/// Every byte as the byte-level alphabet writes it, specials, merged tokens.
fn tokens() -> Vec<String> {
    let mut tokens: Vec<String> = crate::tokenizer::byte_letters().iter().map(char::to_string).collect();
    tokens.extend(SPECIALS.iter().map(|special| (*special).to_owned()));
    tokens.extend(MERGES.iter().map(|(left, right)| format!("{left}{right}")));
    tokens
}

struct Random(u64);

impl Random {
    /// A number in [-1, 1).
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / 8_388_608.0 - 1.0
    }
}

/// Collects a GGUF file of version 3.
#[derive(Default)]
struct Writer {
    pairs: u64,
    metadata: Vec<u8>,
    tensors: u64,
    descriptions: Vec<u8>,
    data: Vec<u8>,
}

impl Writer {
    fn string(target: &mut Vec<u8>, text: &str) {
        target.extend((text.len() as u64).to_le_bytes());
        target.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.pairs += 1;
        Self::string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        Self::string(&mut self.metadata, value);
    }

    fn number(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
    }

    fn list(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, 9);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend((len as u64).to_le_bytes());
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.list(key, 8, values.len());
        for value in values {
            Self::string(&mut self.metadata, value);
        }
    }

    fn integers(&mut self, key: &str, values: &[i32]) {
        self.list(key, 5, values.len());
        for value in values {
            self.metadata.extend(value.to_le_bytes());
        }
    }

    fn tensor(&mut self, name: &str, dimensions: &[u32], kind: u32, data: &[u8]) {
        self.tensors += 1;
        Self::string(&mut self.descriptions, name);
        let count = u32::try_from(dimensions.len()).expect("one or two dimensions");
        self.descriptions.extend(count.to_le_bytes());
        for size in dimensions {
            self.descriptions.extend(u64::from(*size).to_le_bytes());
        }
        self.descriptions.extend(kind.to_le_bytes());
        self.descriptions.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn vector(&mut self, name: &str, len: u32, random: &mut Random) {
        let data: Vec<u8> = (0..len).flat_map(|_| (1.0 + 0.1 * random.next()).to_le_bytes()).collect();
        self.tensor(name, &[len], 0, &data);
    }

    fn half_matrix(&mut self, name: &str, rows: u32, columns: u32, scale: f32, random: &mut Random) {
        let value = |_| f16::from_f32(scale * random.next()).to_le_bytes();
        let data: Vec<u8> = (0..rows * columns).flat_map(value).collect();
        self.tensor(name, &[columns, rows], 1, &data);
    }

    fn finish(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.pairs.to_le_bytes());
        file.extend(self.metadata);
        file.extend(self.descriptions);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }
}
