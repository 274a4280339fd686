//! GGUF files: metadata and tensors, read by position.
//!
//! Opening reads the header only, so that a router can have the tokenizer without
//! the weights. Nothing is mapped: a model file that shrinks under us is then a
//! read error instead of a fatal signal, and weights are repacked anyway. Every
//! count is checked against the bytes that are left before anything is allocated,
//! so a damaged file gives an error and never a panic.

mod quant;
mod reader;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use quant::TensorType;
use reader::Reader;

// 1 MiB: large enough that the disk, not the system calls, decides.
const HASH_READ_BYTES: usize = 1 << 20;

/// Why a model file was refused.
#[derive(Debug, Error)]
pub enum GgufError {
    /// The file could not be opened or read.
    #[error("cannot read {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The first four bytes are not `GGUF`.
    #[error("{} is not a GGUF file; give the path of a model in GGUF format", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
    },
    /// A version of the format that nobody has defined yet, or a big-endian file.
    #[error("GGUF version {version} is not supported; convert the model to version 2 or 3, little-endian")]
    Version {
        /// What the file says.
        version: u32,
    },
    /// The file ends before what it announces.
    #[error("the file is truncated or damaged: {what} does not fit into it; download it again")]
    Truncated {
        /// What was being read.
        what: String,
    },
    /// A value has a type or size that the format does not know.
    #[error("the file is damaged: {what}; download it again")]
    Damaged {
        /// What was being read.
        what: String,
    },
    /// A tensor is stored in a type that we have no decoder for.
    #[error(
        "tensor {tensor} has type {kind}, which is not supported; \
         use a file in F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K or Q6_K"
    )]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The type, by name or number.
        kind: String,
    },
    /// A metadata key is absent or of another type.
    #[error("the file has no usable {key}; it is not a complete model")]
    Key {
        /// The key.
        key: String,
    },
}

/// A metadata value. Integers of all widths are `Integer`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer that fits.
    Integer(i64),
    /// A float of either width.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text; bytes that are no UTF-8 are replaced.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of numbers or truth values.
    Numbers(Vec<f64>),
}

/// A tensor's place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Values per row.
    pub columns: usize,
    /// How values are stored.
    pub kind: TensorType,
    /// First byte, from the start of the file.
    offset: u64,
}

/// An open file: its metadata and where its tensors are.
pub struct Gguf {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Reads the header.
    ///
    /// # Errors
    /// If the file cannot be read, is no GGUF, or does not hold what it announces.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let io_error = |error| GgufError::Io { path: path.to_path_buf(), error };
        let file = File::open(path).map_err(io_error)?;
        let info = file.metadata().map_err(io_error)?;
        if !info.is_file() {
            return Err(GgufError::NotGguf { path: path.to_path_buf() });
        }
        let file_bytes = info.len();
        let mut reader = Reader::new(&file, file_bytes, path);
        let (metadata, tensors) = reader.header()?;
        Ok(Self { path: path.to_path_buf(), file, file_bytes, metadata, tensors })
    }

    /// The file's path, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `general.architecture`, such as `llama`.
    ///
    /// # Errors
    /// If the file does not say.
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.text("general.architecture")
    }

    /// `general.name`, else the file's name without its extension.
    pub fn name(&self) -> String {
        let stem = || self.path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        self.text("general.name").map(str::to_owned).ok().or_else(stem).unwrap_or_default()
    }

    /// A metadata value, if the file has the key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A text.
    ///
    /// # Errors
    /// If the key is absent or no text.
    pub fn text(&self, key: &str) -> Result<&str, GgufError> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(GgufError::Key { key: key.to_owned() }),
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// If the key is absent or no such list.
    pub fn texts(&self, key: &str) -> Result<&[String], GgufError> {
        match self.metadata.get(key) {
            Some(Value::Texts(texts)) => Ok(texts),
            _ => Err(GgufError::Key { key: key.to_owned() }),
        }
    }

    /// A list of numbers, if present.
    pub fn numbers(&self, key: &str) -> Option<&[f64]> {
        match self.metadata.get(key) {
            Some(Value::Numbers(numbers)) => Some(numbers),
            _ => None,
        }
    }

    /// A number that is not negative.
    ///
    /// # Errors
    /// If the key is absent or no such number.
    pub fn count(&self, key: &str) -> Result<usize, GgufError> {
        match self.metadata.get(key) {
            Some(Value::Integer(value)) => usize::try_from(*value).ok(),
            _ => None,
        }
        .ok_or_else(|| GgufError::Key { key: key.to_owned() })
    }

    /// A float, if present.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key) {
            Some(Value::Float(value)) => Some(*value),
            _ => None,
        }
    }

    /// A truth value, if present.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Reads a tensor's bytes, still in its stored type.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn tensor_bytes(&self, tensor: &TensorInfo) -> Result<Vec<u8>, GgufError> {
        let truncated = || GgufError::Truncated { what: format!("tensor {}", tensor.name) };
        let bytes = tensor.row_bytes().checked_mul(tensor.rows).ok_or_else(truncated)?;
        // The header was checked against the file's length, so this is no more
        // than the file.
        let mut data = vec![0; bytes];
        self.file
            .read_exact_at(&mut data, tensor.offset)
            .map_err(|error| GgufError::Io { path: self.path.clone(), error })?;
        Ok(data)
    }

    /// BLAKE3 over the whole file, 16 bytes as 32 hexadecimal digits: what a
    /// space names as its model. It reads the file once (about 0.1 s for 100 MB
    /// that are in the page cache); two files that differ in one byte never
    /// share blocks, and a renamed copy does.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn fingerprint(&self) -> Result<String, GgufError> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; HASH_READ_BYTES];
        let mut offset = 0;
        while offset < self.file_bytes {
            let read = self
                .file
                .read_at(&mut buffer, offset)
                .map_err(|error| GgufError::Io { path: self.path.clone(), error })?;
            if read == 0 {
                return Err(GgufError::Truncated { what: "the end of the file".to_owned() });
            }
            hasher.update(&buffer[..read]);
            offset += read as u64;
        }
        Ok(hasher.finalize().to_hex()[..32].to_owned())
    }
}

impl TensorInfo {
    /// Stored bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.columns / self.kind.group_values() * self.kind.group_bytes()
    }

    /// Decodes one row of `bytes`, which [`Gguf::tensor_bytes`] returned.
    ///
    /// # Panics
    /// If the row or the target does not fit the tensor.
    pub fn decode_row(&self, bytes: &[u8], row: usize, target: &mut [f32]) {
        assert_eq!(target.len(), self.columns, "one value per column");
        let stored = &bytes[row * self.row_bytes()..][..self.row_bytes()];
        self.kind.decode(stored, target);
    }
}
