//! TLS 1.3 with certificates that say nothing: made at start, never stored, accepted from anybody. The handshake proves that the other side has the private key of
//! the certificate it showed; *who* that is, is proved afterwards by a MUNGE credential over both certificates' fingerprints (see [`super::auth`]).

use super::error::PeerError;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection, SignatureScheme,
};
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// SHA-256 of a certificate, in hexadecimal.
pub(super) type Fingerprint = String;

/// A record's payload limit (RFC 8446, 5.2).
const MAX_RECORD: usize = 16_384 + 256;

/// Both roles' TLS settings around one key of this process.
#[derive(Debug)]
pub(super) struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    provider: Arc<CryptoProvider>,
    pub(super) fingerprint: Fingerprint,
}

impl Tls {
    pub(super) fn new() -> Result<Self, PeerError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let made = rcgen::generate_simple_self_signed(vec!["slurm-vm".to_owned()])?;
        let certificate = made.cert.der().clone();
        let fingerprint = hex(&Sha256::digest(&certificate));
        let key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let accept = Arc::new(AcceptAny {
            provider: Arc::clone(&provider),
        });
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&accept) as Arc<dyn ServerCertVerifier>)
            .with_client_auth_cert(vec![certificate.clone()], key())?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(accept)
            .with_single_cert(vec![certificate], key())?;
        // No tickets: nothing to resume, and no record may arrive that nobody waits for when a stream goes on without TLS.
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            provider,
            fingerprint,
        })
    }

    /// Random bytes in hexadecimal, from the same source as the keys.
    pub(super) fn random_hex(&self, bytes: usize) -> Result<String, PeerError> {
        let mut buffer = vec![0; bytes];
        self.provider
            .secure_random
            .fill(&mut buffer)
            .map_err(|_| rustls::Error::FailedToGetRandomBytes)?;
        Ok(hex(&buffer))
    }

    pub(super) fn connect(&self, socket: TcpStream, deadline: Duration) -> Result<TlsStream, PeerError> {
        let name = ServerName::try_from("slurm-vm").map_err(|_| rustls::Error::General("server name".into()))?;
        TlsStream::handshake(ClientConnection::new(Arc::clone(&self.client), name)?.into(), socket, deadline)
    }

    pub(super) fn accept(&self, socket: TcpStream, deadline: Duration) -> Result<TlsStream, PeerError> {
        TlsStream::handshake(ServerConnection::new(Arc::clone(&self.server))?.into(), socket, deadline)
    }
}

/// Accepts every certificate, but not a handshake that its key did not sign.
#[derive(Debug)]
struct AcceptAny {
    provider: Arc<CryptoProvider>,
}

impl AcceptAny {
    fn signed(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for AcceptAny {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A blocking TLS stream whose every operation ends by one deadline.
///
/// It takes exactly one TLS record at a time from the socket and never reads ahead: what follows the last record of the handshake is still in the socket, so a
/// relay stream can go on in the clear from a known place.
#[derive(Debug)]
pub(super) struct TlsStream {
    conn: Connection,
    socket: TcpStream,
    until: Instant,
    record: Vec<u8>,
}

impl TlsStream {
    fn handshake(conn: Connection, socket: TcpStream, deadline: Duration) -> Result<Self, PeerError> {
        let mut stream = Self {
            conn,
            socket,
            until: Instant::now() + deadline,
            record: Vec::new(),
        };
        stream.shake().map_err(|e| PeerError::from_io("agree on TLS", deadline, e))?;
        Ok(stream)
    }

    fn shake(&mut self) -> io::Result<()> {
        while self.conn.is_handshaking() {
            if self.conn.wants_write() {
                self.flush()?;
            } else {
                self.fill()?;
            }
        }
        self.flush()
    }

    /// All operations from now on end by this.
    pub(super) fn set_deadline(&mut self, deadline: Duration) {
        self.until = Instant::now() + deadline;
    }

    /// The other side's certificate.
    pub(super) fn peer_fingerprint(&self) -> Option<Fingerprint> {
        self.conn.peer_certificates()?.first().map(|c| hex(&Sha256::digest(c)))
    }

    /// A value that only the two ends of this very connection know (RFC 5705).
    pub(super) fn channel(&self) -> Result<String, PeerError> {
        let out = self.conn.export_keying_material([0_u8; 32], b"EXPORTER-slurm-vm-peer", None)?;
        Ok(hex(&out))
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Takes it apart for a relay.
    pub(super) fn into_parts(self) -> (Connection, TcpStream) {
        (self.conn, self.socket)
    }

    /// Says goodbye properly, so that the other side can tell an end from a cut. Bounded, and without an answer.
    pub(super) fn close(mut self) {
        self.set_deadline(Duration::from_secs(1));
        self.conn.send_close_notify();
        let _ = self.flush();
    }

    fn left(&self) -> io::Result<Duration> {
        self.until
            .checked_duration_since(Instant::now())
            .filter(|d| !d.is_zero())
            .ok_or_else(|| io::ErrorKind::TimedOut.into())
    }

    fn read_some(&mut self, from: usize) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        loop {
            match self.socket.read(&mut self.record[from..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn read_record_part(&mut self, mut from: usize) -> io::Result<()> {
        while from < self.record.len() {
            match self.read_some(from)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => from += n,
            }
        }
        Ok(())
    }

    /// Takes one record off the socket and gives it to TLS.
    fn fill(&mut self) -> io::Result<()> {
        self.record.clear();
        self.record.resize(5, 0);
        self.read_record_part(0)?;
        let len = usize::from(u16::from_be_bytes([self.record[3], self.record[4]]));
        if len > MAX_RECORD {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                rustls::Error::General("a record that is too long".into()),
            ));
        }
        self.record.resize(5 + len, 0);
        self.read_record_part(5)?;
        let record = std::mem::take(&mut self.record);
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            self.conn.read_tls(&mut rest)?;
            if let Err(e) = self.conn.process_new_packets() {
                // The alert tells the other side why.
                let _ = self.flush();
                return Err(io::Error::new(io::ErrorKind::InvalidData, e));
            }
        }
        self.record = record;
        Ok(())
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.conn.reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.fill()?,
                other => return other,
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.conn.writer().write(buffer)?;
        if n == 0 && !buffer.is_empty() {
            self.flush()?;
            return self.conn.writer().write(buffer);
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.conn.wants_write() {
            self.socket.set_write_timeout(Some(self.left()?))?;
            match self.conn.write_tls(&mut self.socket) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}
