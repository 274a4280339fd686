//! Who may open sessions, and the node's secret that their keys derive from.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use terrace_core::{Locality, TenantId, TenantKey, tenant_id};

use crate::config::{NAME_BYTES_MAX, Tenant as TenantConfig, Windows};

const SECRET_BYTES: usize = 32;

/// The node's secret. It survives in `node.key` and leaves the machine never.
pub struct NodeSecret([u8; SECRET_BYTES]);

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read or made.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It has another length.
    #[error("{path} has {found} bytes, not {SECRET_BYTES}; restore it from a backup, or empty the data directory", path = path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: usize,
    },
    /// The kernel has no randomness.
    #[error("no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

impl NodeSecret {
    /// Reads the secret, or makes one on the first start. The file is complete or not there.
    ///
    /// # Errors
    /// The file is of no use, or cannot be made.
    pub fn open(data_dir: &Path) -> Result<Self, SecretError> {
        let path = data_dir.join("node.key");
        let failed = |source| SecretError::File { path: path.clone(), source };
        match std::fs::read(&path) {
            Ok(bytes) => Self::from_file(&path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut secret = [0; SECRET_BYTES];
                getrandom::fill(&mut secret)?;
                let draft = data_dir.join(format!("node.key.{}", std::process::id()));
                write_private(&draft, &secret).map_err(failed)?;
                // A link never replaces a file: of two first starts one wins, and both read it.
                let linked = std::fs::hard_link(&draft, &path);
                std::fs::remove_file(&draft).map_err(failed)?;
                match linked {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
                    Ok(()) | Err(_) => {
                        sync_folder(data_dir).map_err(failed)?;
                        let bytes = std::fs::read(&path).map_err(failed)?;
                        Self::from_file(&path, &bytes)
                    }
                }
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn from_file(path: &Path, bytes: &[u8]) -> Result<Self, SecretError> {
        let secret = bytes
            .try_into()
            .map_err(|_| SecretError::Length { path: path.to_owned(), found: bytes.len() })?;
        Ok(Self(secret))
    }

    /// Public identity of the node, for superblocks. It does not reveal the secret.
    pub fn node(&self) -> [u8; 16] {
        let hash = blake3::Hasher::new_derive_key("terrace 2026 node id v1").update(&self.0).finalize();
        let mut node = [0; 16];
        node.copy_from_slice(&hash.as_bytes()[..16]);
        node
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_folder(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}

/// A tenant that may open sessions.
#[derive(Clone, Debug)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: TenantId,
    /// What its block ids are keyed with.
    pub key: TenantKey,
    /// What becomes of windows of its local sessions.
    pub windows: Windows,
}

/// At which end of a session's connection its process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// On the lane, as the daemon's own user.
    SameUser,
    /// On the lane, as this other one.
    OtherUser(u32),
    /// Wherever gRPC comes from.
    Remote,
}

impl Tenant {
    /// How a session of such a peer moves bytes.
    pub fn locality(&self, peer: Peer) -> Locality {
        match (peer, self.windows) {
            (Peer::Remote, _) => Locality::Streamed,
            (_, Windows::Adopt) | (Peer::SameUser, Windows::Auto) => Locality::Local,
            (_, Windows::Isolated) | (Peer::OtherUser(_), Windows::Auto) => Locality::Isolated,
        }
    }
}

/// Why a session was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Unknown tenant or wrong token; the two are not told apart.
    #[error(
        "unknown tenant, or wrong token; check `tenant` and `token` against the daemon's [[tenant]] table"
    )]
    WhoAreYou,
    /// Another user of the machine must prove that it may act for the tenant.
    #[error(
        "user {uid} is not the daemon's, and this tenant has no token by which it could prove itself; give it one in the daemon's [[tenant]] table"
    )]
    NoToken {
        /// The user.
        uid: u32,
    },
}

/// All tenants.
#[derive(Debug)]
pub struct Tenants {
    // Sorted by name.
    known: Vec<(Tenant, Option<blake3::Hash>)>,
}

impl Tenants {
    /// From the configuration.
    pub fn new(configured: &[TenantConfig], secret: &NodeSecret) -> Self {
        let mut known: Vec<_> = configured
            .iter()
            .map(|tenant| {
                let id = tenant_id(&tenant.name);
                let key = TenantKey::derive(&secret.0, id);
                let token = tenant.token.as_ref().map(|token| blake3::hash(token.as_bytes()));
                (Tenant { name: tenant.name.clone(), id, key, windows: tenant.windows }, token)
            })
            .collect();
        known.sort_by(|one, other| one.0.name.cmp(&other.0.name));
        Self { known }
    }

    /// Who opens a session. An empty name means "default".
    ///
    /// # Errors
    /// [`Denied`].
    pub fn admit(&self, name: &str, token: &str, peer: Peer) -> Result<&Tenant, Denied> {
        let (tenant, wanted) = self.entry(name).ok_or(Denied::WhoAreYou)?;
        // Hashes compare in constant time, and a token is not kept in memory.
        let granted = match (wanted, peer) {
            (None, Peer::OtherUser(uid)) => return Err(Denied::NoToken { uid }),
            (None, Peer::SameUser | Peer::Remote) => true,
            (Some(wanted), _) => token.len() <= NAME_BYTES_MAX && *wanted == blake3::hash(token.as_bytes()),
        };
        if granted { Ok(tenant) } else { Err(Denied::WhoAreYou) }
    }

    /// A tenant by its name; an empty one means "default".
    pub fn named(&self, name: &str) -> Option<&Tenant> {
        self.entry(name).map(|entry| &entry.0)
    }

    /// Every tenant, by name.
    pub fn all(&self) -> impl Iterator<Item = &Tenant> {
        self.known.iter().map(|entry| &entry.0)
    }

    fn entry(&self, name: &str) -> Option<&(Tenant, Option<blake3::Hash>)> {
        let name = if name.is_empty() { "default" } else { name };
        let index = self.known.binary_search_by(|entry| entry.0.name.as_str().cmp(name)).ok()?;
        self.known.get(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenants(folder: &Path) -> Tenants {
        let configured =
            [("default", None), ("blue", Some("secret")), ("amber", None)].map(|(name, token)| {
                TenantConfig {
                    name: name.to_owned(),
                    token: token.map(str::to_owned),
                    windows: Windows::Auto,
                }
            });
        Tenants::new(&configured, &NodeSecret::open(folder).unwrap())
    }

    /// A wrong token, none, or an unknown name must not open a session, and the answers must be equal.
    #[test]
    fn only_the_right_token_is_admitted() {
        let folder = tempfile::tempdir().unwrap();
        let tenants = tenants(folder.path());
        assert_eq!(tenants.admit("blue", "secret", Peer::Remote).unwrap().name, "blue");
        assert_eq!(tenants.admit("", "whatever", Peer::SameUser).unwrap().name, "default");
        for (name, token) in [("blue", ""), ("blue", "secreT"), ("green", "secret"), ("green", "")] {
            for peer in [Peer::SameUser, Peer::OtherUser(7), Peer::Remote] {
                assert_eq!(tenants.admit(name, token, peer).unwrap_err(), Denied::WhoAreYou);
            }
        }
    }

    /// Another user of the machine must not get in without a token, and must never share pages unless it is said so.
    #[test]
    fn another_user_needs_a_token_and_is_isolated() {
        let folder = tempfile::tempdir().unwrap();
        let tenants = tenants(folder.path());
        let other = Peer::OtherUser(7);
        assert_eq!(tenants.admit("default", "", other).unwrap_err(), Denied::NoToken { uid: 7 });
        let blue = tenants.admit("blue", "secret", other).unwrap();
        for (windows, same, different) in [
            (Windows::Auto, Locality::Local, Locality::Isolated),
            (Windows::Adopt, Locality::Local, Locality::Local),
            (Windows::Isolated, Locality::Isolated, Locality::Isolated),
        ] {
            let tenant = Tenant { windows, ..blue.clone() };
            assert_eq!(tenant.locality(Peer::SameUser), same);
            assert_eq!(tenant.locality(other), different);
            assert_eq!(tenant.locality(Peer::Remote), Locality::Streamed);
        }
    }

    /// A new secret after a restart would orphan every block: it must be the same one, private, and complete.
    #[test]
    fn the_secret_survives() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let first = NodeSecret::open(folder.path()).unwrap().node();
        assert_eq!(NodeSecret::open(folder.path()).unwrap().node(), first);
        let path = folder.path().join("node.key");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the draft was left behind");
        std::fs::write(&path, b"short").unwrap();
        let refused = NodeSecret::open(folder.path()).err().unwrap().to_string();
        assert!(refused.contains("5 bytes"), "{refused}");
    }
}
