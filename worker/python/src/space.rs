//! Spaces, and names of blocks in them.

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use terrace_core::TokenCount;

use crate::errors::invalid;

/// A space that a session opened; see the package's stubs.
#[pyclass(frozen, module = "terrace_kv")]
#[derive(Clone, Debug)]
pub(crate) struct Space {
    pub(crate) space: terrace_client::Space,
}

#[pymethods]
impl Space {
    /// Identity of the space, 16 bytes.
    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.space.id().to_bytes())
    }

    /// Payload of one block in bytes.
    #[getter]
    fn block_bytes(&self) -> u64 {
        self.space.block_bytes().get()
    }

    /// Bytes from one frame to the next in memory.
    #[getter]
    fn frame_bytes(&self) -> u64 {
        self.space.frame_bytes().get()
    }

    /// Generation when it was opened; `clear` moves it.
    #[getter]
    fn generation(&self) -> u64 {
        self.space.generation()
    }

    /// Identity of the block that is called `key` here, 16 bytes.
    fn block_id<'py>(&self, py: Python<'py>, key: PyBackedBytes) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.space.block_id(&key).to_bytes())
    }

    fn __repr__(&self) -> String {
        format!(
            "Space(id={}, block_bytes={}, generation={})",
            self.space.id(),
            self.space.block_bytes().get(),
            self.space.generation()
        )
    }
}

/// Keys of the whole blocks of a prompt: each names its tokens and all before it.
/// The unfilled tail has no key.
#[pyfunction]
pub(crate) fn chain_keys(
    py: Python<'_>,
    tokens: Vec<u32>,
    tokens_per_block: u32,
) -> PyResult<Vec<Bound<'_, PyBytes>>> {
    if tokens_per_block == 0 {
        return Err(invalid("tokens_per_block is 0; a block holds at least one token"));
    }
    let keys = py.detach(|| terrace_core::chain_keys(&tokens, TokenCount::new(tokens_per_block)));
    Ok(keys.iter().map(|key| PyBytes::new(py, key)).collect())
}
