# Clients of the agent's socket as another user. Arguments: uid, socket, and how.
#   relay            standard input to the socket, the socket to standard output
#   drip COUNT       so many connections that say one byte a second; prints how many were closed on them each second
use strict; use warnings; use IO::Socket::UNIX; use IO::Select; use Time::HiRes qw(time);
my ($uid, $path, $how, $count) = @ARGV;
$) = "$uid $uid"; $( = $uid; ($<, $>) = ($uid, $uid);
$| = 1;
sub dial { IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path) }
if ($how eq 'relay') {
    my $s = dial() or die "connect: $!";
    my $child = fork() // die "fork: $!";
    if (!$child) {
        close STDOUT;
        while (sysread(STDIN, my $b, 65536)) { local $SIG{PIPE} = 'IGNORE'; my $o = 0; while ($o < length $b) { my $n = syswrite($s, $b, length($b) - $o, $o); exit 0 unless defined $n; $o += $n; } }
        exit 0;
    }
    close STDIN;
    while (sysread($s, my $b, 65536)) { my $o = 0; while ($o < length $b) { my $n = syswrite(STDOUT, $b, length($b) - $o, $o); last unless defined $n; $o += $n; } }
    kill 'TERM', $child; waitpid $child, 0;
} else {
    $SIG{PIPE} = 'IGNORE';
    my %open; my ($closed, $failed) = (0, 0);
    for (1 .. $count) { my $s = dial(); if ($s) { $s->blocking(0); syswrite($s, '{'); $open{fileno $s} = $s } else { $failed++ } }
    print "made ", scalar(keys %open), " failed $failed\n";
    while (1) {
        my $look = IO::Select->new(values %open);
        my $until = time + 1;
        while ((my $left = $until - time) > 0 && %open) {
            for my $s ($look->can_read($left)) { my $n = sysread($s, my $b, 4096); if (defined $n && $n == 0 || !defined $n && !$!{EAGAIN}) { $look->remove($s); delete $open{fileno $s}; close $s; $closed++ } }
        }
        syswrite($_, ' ') for values %open;
        print "open ", scalar(keys %open), " closed $closed\n";
        last unless %open;
    }
}
