"""What both clients and the commands share: each operation of a gateway is described once, as a
`Call` of `calls`, and done by one of the senders of `sending`."""
