//! Text to token ids and back, as the GGUF file describes it.
//!
//! Two families: byte-level BPE (`gpt2`, of which the pre-tokenizers of SmolLM,
//! GPT-2 and Llama 3 are known) and SentencePiece BPE (`llama`). Only a file's
//! header is needed. Texts of special tokens are recognised in the input, as
//! chat templates need it.

use std::collections::BTreeMap;
use std::path::Path;

use thiserror::Error;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::chat::{ChatError, ChatTemplate};
use crate::gguf::{Gguf, GgufError};

// As Llama 3 publishes it.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
// Texts by which the end of an answer is known, beside the ids that the file
// names: many files name only one of those that the model produces.
const END_TEXTS: [&str; 7] =
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"];
// SentencePiece writes a space as this letter.
const SPACE_LETTER: char = '\u{2581}';
const KIND_CONTROL: u32 = 3;
const KIND_USER: u32 = 4;
const KIND_BYTE: u32 = 6;

/// Why there is no tokenizer.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file was refused, or lacks a tokenizer.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The chat template does not parse.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A kind of tokenizer that is not implemented.
    #[error("the file's tokenizer is {found}; terrace knows gpt2 (smollm, gpt-2, llama-bpe) and llama")]
    Unsupported {
        /// Family and pre-tokenizer.
        found: String,
    },
    /// The lists in the file do not fit each other.
    #[error("the file's tokenizer is damaged: {what}; download it again")]
    Damaged {
        /// What was wrong.
        what: String,
    },
    /// A text could not be split.
    #[error("cannot tokenize the text: {what}")]
    Encode {
        /// What the library said.
        what: String,
    },
}

/// A model's tokenizer, its special tokens and its chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What each token adds to the output; empty for control tokens.
    pieces: Vec<Vec<u8>>,
    texts: Vec<String>,
    begin: Option<u32>,
    add_begin: bool,
    ends: Vec<u32>,
    chat: Option<ChatTemplate>,
    context: usize,
    model: String,
}

impl Tokenizer {
    /// Reads the header of a file and builds its tokenizer (about 30 ms for
    /// 50,000 tokens).
    ///
    /// # Errors
    /// If the file is no GGUF, or its tokenizer is incomplete or unknown.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        Self::from_gguf(&Gguf::open(path)?)
    }

    /// Builds the tokenizer of an open file.
    ///
    /// # Errors
    /// If the tokenizer is incomplete or unknown.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TokenizerError> {
        let family = file.text("tokenizer.ggml.model")?.to_owned();
        let texts = file.texts("tokenizer.ggml.tokens")?.to_vec();
        let count = u32::try_from(texts.len())
            .map_err(|_| TokenizerError::Damaged { what: format!("{} tokens", texts.len()) })?;
        let kinds = kinds(file, texts.len());
        let (mut inner, pieces) = match family.as_str() {
            "gpt2" => (byte_level(file, &texts)?, byte_pieces(&texts, &kinds)),
            "llama" => (sentence_piece(file, &texts)?, sentence_pieces(&texts, &kinds)),
            _ => return Err(TokenizerError::Unsupported { found: family }),
        };
        let special = texts.iter().zip(&kinds).filter(|(_, kind)| matches!(**kind, KIND_CONTROL | KIND_USER));
        let added = special
            .map(|(text, kind)| AddedToken::from(text.clone(), *kind == KIND_CONTROL).normalized(false));
        inner
            .add_special_tokens(added)
            .map_err(|error| TokenizerError::Damaged { what: error.to_string() })?;
        let id = |key: &str| {
            let id = file.count(&format!("tokenizer.ggml.{key}")).ok().and_then(|id| u32::try_from(id).ok());
            id.filter(|id| *id < count)
        };
        let begin = id("bos_token_id");
        let mut ends: Vec<u32> =
            ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(id).collect();
        let named = (0..count).zip(&texts).zip(&kinds);
        ends.extend(named.filter_map(|((token, text), kind)| {
            (*kind == KIND_CONTROL && END_TEXTS.contains(&text.as_str())).then_some(token)
        }));
        ends.sort_unstable();
        ends.dedup();
        let text_of = |token: Option<u32>| {
            token.and_then(|token| texts.get(usize::try_from(token).ok()?)).cloned().unwrap_or_default()
        };
        let chat = match file.text("tokenizer.chat_template") {
            Ok(source) => Some(ChatTemplate::new(source, &text_of(begin), &text_of(id("eos_token_id")))?),
            Err(_) => None,
        };
        let add_begin = file.flag("tokenizer.ggml.add_bos_token").unwrap_or(family == "llama");
        let architecture = file.architecture()?;
        let context = file.count(&format!("{architecture}.context_length")).unwrap_or(0);
        let model = file.name();
        Ok(Self { inner, pieces, texts, begin, add_begin, ends, chat, context, model })
    }

    /// The model's own name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Positions that the model was trained for; 0 if the file does not say.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Number of token ids.
    pub fn vocabulary(&self) -> usize {
        self.texts.len()
    }

    /// Token ids that end an answer, ascending.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The template that turns messages into a prompt, if the model has one.
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }

    /// Id of a token by its text in the file.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// Ids of a plain text, with the begin token in front where the model is
    /// used to it.
    ///
    /// # Errors
    /// If the text cannot be split.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        if self.add_begin {
            tokens.extend(self.begin);
        }
        tokens.extend(self.encode_bare(text)?);
        Ok(tokens)
    }

    /// Ids of a text that has its special tokens written out, such as a rendered
    /// chat template.
    ///
    /// # Errors
    /// If the text cannot be split.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|error| TokenizerError::Encode { what: error.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a chat prompt. Templates write the begin token themselves; where
    /// one does not, it is added if the model is used to it.
    ///
    /// # Errors
    /// If the rendered text cannot be split.
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, TokenizerError> {
        let tokens = self.encode_bare(rendered)?;
        match self.begin {
            Some(begin) if self.add_begin && tokens.first() != Some(&begin) => {
                Ok([begin].into_iter().chain(tokens).collect())
            }
            _ => Ok(tokens),
        }
    }

    /// Text of some tokens. Control tokens add nothing; bytes that are no UTF-8
    /// are replaced.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut stream = self.decode_stream();
        let mut text: String = tokens.iter().map(|token| stream.push(*token)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// Starts decoding an answer token by token.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, pending: Vec::new() }
    }

    /// Bytes that a token adds to the output; none if it is control or unknown.
    pub fn piece(&self, token: u32) -> &[u8] {
        usize::try_from(token).ok().and_then(|token| self.pieces.get(token)).map_or(&[], Vec::as_slice)
    }
}

/// Decodes tokens as they come. A character that is split over tokens is held
/// back until it is whole, so what is returned is always valid text.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
}

impl DecodeStream<'_> {
    /// Takes a token; returns the text that it completes, often empty.
    pub fn push(&mut self, token: u32) -> String {
        self.pending.extend_from_slice(self.tokenizer.piece(token));
        let mut text = String::new();
        let mut used = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            // Bytes that more could complete wait; any others are replaced.
            let at_end = used + chunk.invalid().len() == self.pending.len();
            if at_end && could_continue(chunk.invalid()) {
                break;
            }
            if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                used += chunk.invalid().len();
            }
        }
        self.pending.drain(..used);
        text
    }

    /// Ends the answer; returns what was held back, replaced as it is no text.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Whether bytes at the end of the output are the beginning of a character.
fn could_continue(bytes: &[u8]) -> bool {
    let needed = match bytes.first() {
        Some(0xC2..=0xDF) => 2,
        Some(0xE0..=0xEF) => 3,
        Some(0xF0..=0xF4) => 4,
        _ => return false,
    };
    bytes.len() < needed
}

/// Kind of each token; normal where the file does not say.
fn kinds(file: &Gguf, count: usize) -> Vec<u32> {
    let listed = file.numbers("tokenizer.ggml.token_type").unwrap_or(&[]);
    let known = [KIND_CONTROL, KIND_USER, KIND_BYTE];
    let kind = |value: &f64| known.into_iter().find(|kind| f64::from(*kind) == *value).unwrap_or(1);
    listed.iter().map(kind).chain(std::iter::repeat(1)).take(count).collect()
}

fn vocabulary(texts: &[String]) -> Vocab {
    (0u32..).zip(texts).map(|(id, text)| (text.clone(), id)).collect()
}

/// Byte-level BPE, as GPT-2 and its successors.
fn byte_level(file: &Gguf, texts: &[String]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let pre = file.text("tokenizer.ggml.pre").unwrap_or("default");
    let plain = ByteLevel::new(false, false, true);
    let split = |pattern: &str| {
        Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| TokenizerError::Unsupported { found: error.to_string() })
    };
    let (steps, ignore_merges): (Vec<PreTokenizerWrapper>, bool) = match pre {
        "smollm" => (vec![Digits::new(true).into(), plain.into()], false),
        "default" | "gpt-2" | "gpt2" => (vec![plain.into()], false),
        "llama-bpe" | "llama3" | "llama-v3" => {
            (vec![split(LLAMA3_SPLIT)?.into(), ByteLevel::new(false, false, false).into()], true)
        }
        other => return Err(TokenizerError::Unsupported { found: format!("gpt2 with {other}") }),
    };
    let merges = file.texts("tokenizer.ggml.merges")?.iter().map(|merge| {
        let pair = merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
        pair.ok_or_else(|| TokenizerError::Damaged { what: format!("merge {merge:?}") })
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    let bpe = BPE::builder().vocab_and_merges(vocabulary(texts), merges).ignore_merges(ignore_merges).build();
    let bpe = bpe.map_err(|error| TokenizerError::Damaged { what: error.to_string() })?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    Ok(inner)
}

/// SentencePiece BPE, as Llama and Llama 2: merges follow from the scores.
fn sentence_piece(file: &Gguf, texts: &[String]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let scores = file.numbers("tokenizer.ggml.scores").unwrap_or(&[]);
    let ids: BTreeMap<&str, usize> = texts.iter().enumerate().map(|(id, text)| (text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (text, score) in texts.iter().zip(scores) {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(first), Some(second)) = (ids.get(left), ids.get(right)) {
                merges.push((*score, *first, *second));
            }
        }
    }
    // The piece with the best score merges first; ties by the older parts.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges = merges.into_iter().map(|(_, first, second)| (texts[first].clone(), texts[second].clone()));
    let unknown = file.count("tokenizer.ggml.unknown_token_id").unwrap_or(0);
    let unknown = texts.get(unknown).cloned().unwrap_or_else(|| "<unk>".to_owned());
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary(texts), merges.collect())
        .unk_token(unknown)
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(|error| TokenizerError::Damaged { what: error.to_string() })?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let space = SPACE_LETTER.to_string();
    let replace = Replace::new(" ", space.clone())
        .map_err(|error| TokenizerError::Unsupported { found: error.to_string() })?;
    let mut steps = Vec::new();
    if file.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
        steps.push(Prepend::new(space).into());
    }
    steps.push(replace.into());
    inner
        .with_normalizer(Some(NormalizerSequence::new(steps)))
        .map_err(|error| TokenizerError::Damaged { what: error.to_string() })?;
    Ok(inner)
}

/// The letter that byte-level vocabularies write for each byte: itself where it
/// is printable, else a letter from U+0100 upwards.
pub(crate) fn byte_letters() -> [char; 256] {
    let mut next = 0x100u32;
    let mut letters = ['\0'; 256];
    for (byte, letter) in (0u8..=255).zip(letters.iter_mut()) {
        *letter = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("68 letters above U+00FF exist")
            }
        };
    }
    letters
}

fn byte_pieces(texts: &[String], kinds: &[u32]) -> Vec<Vec<u8>> {
    let bytes: BTreeMap<char, u8> = byte_letters().into_iter().zip(0u8..=255).collect();
    let mut utf8 = [0; 4];
    let piece = |(text, kind): (&String, &u32)| match *kind {
        KIND_CONTROL => Vec::new(),
        KIND_USER => text.as_bytes().to_vec(),
        _ => text
            .chars()
            .flat_map(|letter| match bytes.get(&letter) {
                Some(byte) => vec![*byte],
                None => letter.encode_utf8(&mut utf8).as_bytes().to_vec(),
            })
            .collect(),
    };
    texts.iter().zip(kinds).map(piece).collect()
}

fn sentence_pieces(texts: &[String], kinds: &[u32]) -> Vec<Vec<u8>> {
    let piece = |(text, kind): (&String, &u32)| match *kind {
        KIND_CONTROL => Vec::new(),
        KIND_BYTE => {
            let digits = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
            digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).into_iter().collect()
        }
        _ => text.replace(SPACE_LETTER, " ").into_bytes(),
    };
    texts.iter().zip(kinds).map(piece).collect()
}

#[cfg(test)]
mod tests;
