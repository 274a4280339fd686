//! What the configuration refuses, and what it fills in.

use super::*;

fn refused(text: &str) -> String {
    Config::parse(text).map(|config| config.summary()).unwrap_err().to_string()
}

/// A typing error would silently leave a default in place: an unknown key must be named.
#[test]
fn unknown_keys_are_named() {
    let text = refused("data_dir = \"/x\"\npined_bytes = \"1GiB\"");
    assert!(text.contains("pined_bytes"), "{text}");
    let text = refused("data_dir = \"/x\"\n[limits]\nblokcs = 1");
    assert!(text.contains("blokcs"), "{text}");
}

/// A value that cannot work must be refused before anything is touched, by its key and with what is allowed.
#[test]
fn bad_values_name_their_key() {
    for (line, key, allowed) in [
        ("chunk_bytes = \"3MiB\"", "chunk_bytes", "2MiB"),
        ("chunk_bytes = \"64mb\"", "chunk_bytes", "64MiB"),
        ("pinned_bytes = \"64MiB\"", "pinned_bytes", "two chunks"),
        ("grpc_listen = \"0.0.0.0:7070\"", "grpc_listen", "loopback"),
        ("metrics_listen = \"here\"", "metrics_listen", "127.0.0.1"),
        ("io_backend = \"aio\"", "io_backend", "pread"),
        ("window_idle_ms = 1", "window_idle_ms", "10 to"),
        ("[limits]\nblocks_per_request = 9000", "limits.blocks_per_request", "8192"),
        ("[[device]]\npath = \"/a\"\nbytes = \"1MiB\"", "device.bytes", "one chunk"),
        ("[[hbm]]\ndevice = \"gpu0\"\nbytes = \"1GiB\"", "hbm.device", "cuda:0"),
        ("[[hbm]]\ndevice = \"cuda:0\"\nbytes = \"1MiB\"", "hbm.bytes", "no chunk"),
        (
            "[[hbm]]\ndevice = \"cuda:0\"\nbytes = \"1GiB\"\nbytes_min = \"2GiB\"",
            "hbm.bytes_min",
            "more than",
        ),
        ("[[tenant]]\nname = \"\"", "tenant.name", "1 to"),
        ("[[tenant]]\nname = \"a\"\n[[tenant]]\nname = \"a\"", "tenant.name", "twice"),
    ] {
        let text = refused(&format!("data_dir = \"/x\"\n{line}"));
        assert!(text.contains(&format!("`{key}`")), "{line}: {text}");
        assert!(text.contains(allowed), "{line}: {text}");
    }
}

/// The shortest file must do: everything else has a value.
#[test]
fn defaults_are_complete() {
    let config = Config::parse("data_dir = \"/nowhere/terrace\"").unwrap();
    assert_eq!(config.chunk_bytes, ByteCount::new(64 * MIB));
    assert!(config.pinned_bytes.get() >= 128 * MIB);
    assert_eq!(config.devices.len(), 1);
    assert_eq!(config.lane_socket, PathBuf::from("/nowhere/terrace/lane.sock"));
    assert_eq!(config.tenants.len(), 1);
    assert!(config.summary().contains("default without a token"));
}

/// A token in a log would be a leak: debug output must not show it.
#[test]
fn tokens_are_not_shown() {
    let config = Config::parse("data_dir = \"/x\"\n[[tenant]]\nname = \"a\"\ntoken = \"hunter2\"").unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(!config.summary().contains("hunter2"));
}
