//! Listening and connecting: stale files, foreign files, who is at the other end.

use std::os::unix::fs::PermissionsExt;

use super::*;

// Anybody on the machine could connect to a socket with the default mode.
#[tokio::test]
async fn the_socket_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lane.sock");
    for (admits, expected) in [(Admits::Owner, 0o600), (Admits::Group, 0o660), (Admits::Everybody, 0o666)] {
        let _server = LaneServer::bind(&path, admits).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, expected);
    }
}

// A daemon that was killed leaves its socket file; the next start must not
// fail on it, and must not take the socket of a daemon that lives.
#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lane.sock");
    drop(StdListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves the file behind, as a killed daemon would");
    let server = LaneServer::bind(&path, Admits::Owner).unwrap();
    assert!(matches!(LaneServer::bind(&path, Admits::Owner), Err(LaneError::InUse { .. })));
    drop(server);
    assert!(!path.exists(), "a server removes its file");
}

// A mistyped path must not cost somebody's file.
#[tokio::test]
async fn a_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    assert!(matches!(LaneServer::bind(&path, Admits::Owner), Err(LaneError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
}

// The kernel says only "invalid argument" to a long path; we say the limit.
#[tokio::test]
async fn a_long_path_is_refused_with_the_limit() {
    let path = Path::new("/tmp").join("d".repeat(120));
    for error in [
        LaneServer::bind(&path, Admits::Owner).unwrap_err(),
        LaneConnection::connect(&path).await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("the limit is 107"), "{error}");
    }
}

// The daemon ends a session by its peer's pidfd: it must be that of the peer.
#[tokio::test]
async fn the_peer_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lane.sock");
    let server = LaneServer::bind(&path, Admits::Owner).unwrap();
    let client = LaneConnection::connect(&path).await.unwrap();
    let accepted = server.accept().await.unwrap();
    assert_eq!(accepted.peer().pid, std::process::id());
    let facts = std::fs::symlink_metadata(&path).unwrap();
    assert_eq!(accepted.peer().uid, facts.uid());
    drop(client);
    let (_, mut reader, _writer) = accepted.split();
    assert!(reader.next().await.unwrap().is_none());
}

// A kernel without SO_PEERPIDFD would leave us with the socket alone, which a child may hold open.
#[tokio::test]
async fn a_process_is_watched_by_its_number_too() {
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let end = ProcessEnd::watch(syscall::pidfd_of(child.id()).unwrap()).unwrap();
    let early = tokio::time::timeout(std::time::Duration::from_millis(20), end.ended()).await;
    assert!(early.is_err(), "it lives");
    child.kill().unwrap();
    tokio::time::timeout(std::time::Duration::from_secs(30), end.ended()).await.unwrap();
    child.wait().unwrap();
    assert!(syscall::pidfd_of(0).is_none());
}
