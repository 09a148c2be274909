"""The message broker as a port (`port`), RabbitMQ behind it (`amqp`), and a twin in memory."""
