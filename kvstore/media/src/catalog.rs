//! placeholder of this build step

use std::path::PathBuf;

/// The catalog failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CatalogError {
    /// RocksDB said so.
    #[error("catalog {path}: {reason}")]
    Store {
        /// Its folder.
        path: PathBuf,
        /// RocksDB's words.
        reason: String,
    },
}
