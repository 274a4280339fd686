//! What callers pass, checked and turned into the client's types.

use std::time::Duration;

use pyo3::Borrowed;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyString};

use terrace_client::{Durability, MatchMode, Purpose, SpaceKind, SpaceManifest};
use terrace_core::{ByteCount, TokenCount};

use crate::errors::invalid;
use crate::span::copy_in;

/// Longest span that a caller may name; the daemon's own limits are far below.
const SECONDS_MAX: f64 = 1e9;

/// Names of blocks.
pub(crate) type Keys = Vec<PyBackedBytes>;

/// A span of time, in seconds.
///
/// # Errors
/// Less than zero, not a number, or beyond all reason.
pub(crate) fn span(name: &str, seconds: f64) -> PyResult<Duration> {
    if !(0.0..=SECONDS_MAX).contains(&seconds) {
        return Err(invalid(format!("{name} is {seconds}; it must be 0 to {SECONDS_MAX} seconds")));
    }
    Duration::try_from_secs_f64(seconds).map_err(|error| invalid(format!("{name}: {error}")))
}

/// One of a few words.
fn word<T: Copy>(name: &str, found: &str, known: &[(&str, T)]) -> PyResult<T> {
    if let Some((_, value)) = known.iter().find(|(word, _)| *word == found) {
        return Ok(*value);
    }
    let words: Vec<String> = known.iter().map(|(word, _)| format!("\"{word}\"")).collect();
    Err(invalid(format!("{name} is \"{found}\"; it must be one of {}", words.join(", "))))
}

pub(crate) fn durability(found: &str) -> PyResult<Durability> {
    word("durability", found, &[("readable", Durability::Readable), ("durable", Durability::Durable)])
}

pub(crate) fn purpose(found: &str) -> PyResult<Purpose> {
    word("purpose", found, &[("prefill", Purpose::Prefill), ("decode", Purpose::Decode)])
}

pub(crate) fn match_mode(found: &str) -> PyResult<MatchMode> {
    word("mode", found, &[("prefix", MatchMode::Prefix), ("set", MatchMode::Set)])
}

/// A `terrace_kv.SpaceManifest`, by its attributes.
#[derive(FromPyObject)]
pub(crate) struct Manifest {
    model: String,
    model_fingerprint: PyBackedBytes,
    weights_generation: u64,
    dtype: String,
    layout: String,
    tokens_per_block: u32,
    block_bytes: u64,
    kind: String,
    group: u32,
    topology: String,
    rank: u32,
    engine: String,
}

impl Manifest {
    /// The client's manifest.
    ///
    /// # Errors
    /// The first field that is out of bounds.
    pub(crate) fn checked(self) -> PyResult<SpaceManifest> {
        let kinds = [("chain", SpaceKind::Chain), ("window", SpaceKind::Window), ("state", SpaceKind::State)];
        let manifest = SpaceManifest {
            model: self.model,
            model_fingerprint: self.model_fingerprint.to_vec(),
            weights_generation: self.weights_generation,
            dtype: self.dtype,
            layout: self.layout,
            tokens_per_block: TokenCount::new(self.tokens_per_block),
            block_bytes: ByteCount::new(self.block_bytes),
            kind: word("kind", &self.kind, &kinds)?,
            group: self.group,
            topology: self.topology,
            rank: self.rank,
            engine: self.engine,
        };
        manifest.validate().map_err(|error| invalid(error.to_string()))?;
        Ok(manifest)
    }
}

/// Bytes to be stored. `bytes` objects never change and are used where they
/// lie; of any other buffer a copy is taken, because another thread could
/// change it while it is sent and summed.
pub(crate) enum Payload {
    Lent(PyBackedBytes),
    Copied(Vec<u8>),
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Lent(bytes) => bytes,
            Self::Copied(bytes) => bytes,
        }
    }
}

impl FromPyObject<'_, '_> for Payload {
    type Error = PyErr;

    fn extract(found: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = found.cast::<PyBytes>() {
            return Ok(Self::Lent(PyBackedBytes::from(bytes.to_owned())));
        }
        if found.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("a payload is bytes or a buffer, not text"));
        }
        Ok(Self::Copied(copy_in(&found)?))
    }
}
